"""Its place puts this folder on the path: tests of every folder import `laws` from it."""

"""One script a peer: how it writes a network to a file, and how that file becomes a network again."""

"""What Factorpack does to torch modules: reading statistics from them, putting weights into them."""

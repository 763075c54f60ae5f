"""What a compressed network is held against."""

"""What does `latentdiff sample` do between its options and its files? Start with draw.py."""

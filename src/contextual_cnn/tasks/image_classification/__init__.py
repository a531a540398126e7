"""Image classification by staged scores (sections 3.1 and 4.1)."""

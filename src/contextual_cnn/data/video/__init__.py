"""Clips of videos: which frames are drawn, how they are decoded and cropped, and batches of them."""

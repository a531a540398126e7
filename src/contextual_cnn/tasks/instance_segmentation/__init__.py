"""Instance segmentation by Mask R-CNN over a contextual backbone (table 3)."""

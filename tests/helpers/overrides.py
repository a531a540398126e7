"""Overrides that tests share."""

# Crops and flips alone: DALI takes two seconds to build a pipeline that changes colours too
CROPS_ALONE = ("augment.randaugment=null", "augment.color_jitter=0")

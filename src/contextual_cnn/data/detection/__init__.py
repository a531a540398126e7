"""Pictures with annotated objects, in COCO's files."""

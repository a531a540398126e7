"""Video classification by temporal shifts of a ResNet and staged scores (table 2)."""

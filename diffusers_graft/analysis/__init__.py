"""Looking at a pretrained model before choosing what to graft."""

"""The block store: a checkpoint in our own on-disk form, one file per part, ready to be read at disk speed."""

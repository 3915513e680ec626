"""From images, wherever they lie, to a sealed beton file: scan, write, verify, and a copy on the host's own disk."""

"""From a folder of images to a sealed beton file: scan, write, verify."""

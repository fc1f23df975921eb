"""What fits where: the memory a configuration needs, what there is, and the nearest configuration that fits."""

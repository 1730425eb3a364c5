"""The lab: what proved something once, for us. It imports the package and is imported by nothing in it."""

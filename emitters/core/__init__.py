"""The build: a plan to a bundle on disk; nothing here knows a format."""

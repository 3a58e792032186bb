"""Plans, differences and findings as text, markdown and JSON."""

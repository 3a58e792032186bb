"""Policy texts: read from YAML and DSL, printed back, merged, described as a schema."""

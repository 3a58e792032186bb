"""What JSON documents hold: records, saved plans, and everything `--format json` prints.

Each document is a TypedDict. Its limits are keywords of JSON Schema in `Annotated`. `json_schema`
makes the published schema of it, and checks what strangers wrote against it.
"""

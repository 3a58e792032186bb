"""What a source checkpoint holds, read from headers alone: folders, records, the hub."""

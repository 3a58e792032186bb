"""policyc: quantization policies as source files, planned to the byte and built into bundles."""

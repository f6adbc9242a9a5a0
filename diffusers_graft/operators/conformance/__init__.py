"""The conformance suite that every operator passes."""

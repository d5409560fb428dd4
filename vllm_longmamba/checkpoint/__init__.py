"""What the plugin reads of a checkpoint before any weight is loaded: config, training length, fingerprint, table."""

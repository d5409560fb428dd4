"""The long-document job: many documents in, one answer for each out, resumable at any moment."""

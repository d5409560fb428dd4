"""What a person wants to see before trusting a threshold table: in the terminal, and as pictures."""

"""What there is, what is wanted, and how the difference is carried out."""

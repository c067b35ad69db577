"""What programs make of the documentation: two pictures, the reference pages, and the output that pages show."""

"""Makes the host as it should be: `observe` finds what there is, `diff` compares it with what is wanted, `executor`
carries out the difference, and `controller` decides when."""

"""Networks as plans of steps, which one call of C++ runs."""

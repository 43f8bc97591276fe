"""The right answer, in slow plain torch: one textbook page per op. No kernels, no registration."""

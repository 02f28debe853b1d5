"""Code in C++: how it is built, how weights are packed for it, and how it is called. It knows no model."""

"""What a lens is made of: the parts that know neither the user nor a single hook."""

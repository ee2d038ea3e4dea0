"""Where gradlens meets programs and frameworks that know nothing of it: one a file, imported when used."""

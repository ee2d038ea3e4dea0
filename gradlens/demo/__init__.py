"""What `gradlens demo` trains: a script as anybody writes it, without a word of gradlens."""

"""What the numbers mean over time: snapshots go in, findings come out. No torch here."""

"""Trainings that are well, and the same with a mistake: what the rules are measured on."""

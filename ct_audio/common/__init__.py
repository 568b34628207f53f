"""What every package may use: errors, files, units, figures, signals, text for people, the machine."""

"""What disks, power supplies and clocks do to a log."""

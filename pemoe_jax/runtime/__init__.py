"""What every command needs: gin flags, process start-up, progress bars, caches, atomic writes."""

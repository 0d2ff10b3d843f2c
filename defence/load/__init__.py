"""From untrusted files to nets and images; the guards check a file before any library reads it."""

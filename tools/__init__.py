"""The repository's own machinery: it runs the notebooks, writes pages and README, and checks. It is never
shipped."""

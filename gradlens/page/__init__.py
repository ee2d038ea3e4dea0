"""A run as a page: what all views show of it (`summary`), the numbers of the charts (`data`), one HTML file (`html`)."""

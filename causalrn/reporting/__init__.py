"""The report: what run folders hold, arranged into tables and charts, as one page or as figures."""

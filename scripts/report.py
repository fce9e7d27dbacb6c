#!/usr/bin/env python
"""Makes tables and plots of several result files of evaluate.py; of a sweep, statistics over the seeds.

python scripts/report.py --results output/*/results.json --output_dir output/report
python scripts/report.py --sweep output/relative --output_dir output/report
"""

from hf_relpos.results.report import main


if __name__ == "__main__":
    main()

"""What one loss costs, beside what its peers take: cases, contenders, time, memory, errors."""

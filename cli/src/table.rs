//! Tables for people. Pure.

/// Lines with columns as wide as what is in them. A cell that begins with `spanning` may run over those behind it.
pub(crate) fn aligned(rows: &[Vec<String>], spanning: Option<&str>) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let runs_over = |cell: &&String| spanning.is_some_and(|start| cell.starts_with(start));
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        let fits = cells.filter(|cell| !runs_over(cell));
        fits.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths);
        let cells: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let row = |cells: &[&str]| cells.iter().map(|cell| (*cell).to_owned()).collect();
        let rows = [
            row(&["A", "LONG", "C"]),
            row(&["äöü", "x", "y"]),
            row(&["b", "why: it runs over"]),
        ];
        assert_eq!(
            aligned(&rows, Some("why: ")),
            ["A    LONG  C", "äöü  x     y", "b    why: it runs over"]
        );
    }
}

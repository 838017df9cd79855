"""Tables as people save them: separators, encodings, spreadsheets; wrong lines are named rightly."""

from __future__ import annotations

import codecs
import re
import zipfile
from pathlib import Path

import pytest

from fastfundus.data.labels import read_labels
from fastfundus.data.tables import read_cells
from fastfundus.errors import DataError

PLAIN = "file,patient,abnormal\na.jpg,p1,1\nb.jpg,p2,0\n"
BYTES = {
    "plain": PLAIN.encode(),
    "bom": codecs.BOM_UTF8 + PLAIN.encode(),
    "crlf": PLAIN.replace("\n", "\r\n").encode(),
    "old Mac": PLAIN.replace("\n", "\r").encode(),
    "utf-16": PLAIN.encode("utf-16"),
    "utf-16 without a mark": PLAIN.encode("utf-16-le"),
    "utf-16 big-endian": codecs.BOM_UTF16_BE + PLAIN.encode("utf-16-be"),
    "semicolon": PLAIN.replace(",", ";").encode(),
    "tab": PLAIN.replace(",", "\t").encode(),
    "sep": b"sep=;\r\n" + PLAIN.replace(",", ";").encode(),
    "bar": PLAIN.replace(",", "|").encode(),
    "empty columns": "".join(f"{line},,\n" for line in PLAIN.splitlines()).encode(),
    "spaces after commas": PLAIN.replace(",", ", ").encode(),
    "quotes": "".join('"' + line.replace(",", '","') + '"\n' for line in PLAIN.splitlines()).encode(),
    "empty lines": PLAIN.replace("\n", "\n\n").encode(),
}


@pytest.mark.parametrize("form", BYTES)
def test_every_form_says_the_same(tmp_path: Path, form: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(BYTES[form])
    table = read_labels(path)
    assert [(row.file, row.patient, row.columns) for row in table.rows] == [
        ("a.jpg", "p1", {"abnormal": 1.0}),
        ("b.jpg", "p2", {"abnormal": 0.0}),
    ]


def test_a_workbook_keeps_identifiers_whole(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["file", "patient", "age", None], ["a.jpg", 17.0, 61.5, None], ["b.jpg", 18, None, None]):
        book.active.append(row)
    book.active["B3"].number_format = "0000"
    book.create_sheet("notes")
    book.save(tmp_path / "labels.xlsx")
    table = read_labels(tmp_path / "labels.xlsx")
    assert [(row.file, row.patient, row.columns) for row in table.rows] == [
        ("a.jpg", "17", {"age": 61.5}),
        ("b.jpg", "0018", {"age": None}),
    ]
    assert "only the first sheet" in table.notes[0]


def test_lines_are_those_of_the_file_after_a_quoted_line_break(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text('file,remark,split\na.jpg,"two\nlines",train\nb.jpg,plain,nowhere\n')
    table = read_labels(path)
    assert [row.line for row in table.rows] == [2, 4]
    assert "line 4: split 'nowhere'" in table.notes[-1]


def test_decimal_commas_are_read_where_commas_do_not_separate(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("file;acuity\na.jpg;0,5\n")
    assert read_labels(path).rows[0].columns == {"acuity": 0.5}


def test_rows_that_excel_cut_short_are_unknown_at_their_end(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("file,abnormal,age\na.jpg,1,60\nb.jpg\n")
    table = read_labels(path)
    assert table.rows[1].columns == {"abnormal": None, "age": None}
    assert "1 rows have fewer cells than the header, such as line 3" in table.notes[0]


def test_other_encodings_are_read_and_noted(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes("file,patient\na.jpg,Müller\n".encode("cp1252"))
    table = read_labels(path)
    assert table.rows[0].patient == "Müller"
    assert "read as Windows-1252" in table.notes[0]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.xls", b"x", "save it as .xlsx or as CSV"),
        ("a.xlsx", b"no workbook", "cannot be read as an Excel workbook"),
        ("a.csv", bytes(range(256)) * 4, "not a text file"),
        ("a.csv", b"a," * 6000, "has 6,001 columns"),
        ("a.csv", b"file\n" + b'"' + b"x" * 200_000, "not a valid CSV file"),
    ],
)
def test_files_that_are_no_table_are_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_cells(tmp_path / name)


def test_a_workbook_that_expands_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.xlsx"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/worksheets/sheet1.xml", b" " * (80 << 20))
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"cannot be read as an Excel workbook .it expands to 80 MiB.; save it as CSV"):
        read_cells(path)


def test_a_table_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sparse.csv"
    with path.open("wb") as file:
        file.truncate(20 << 30)
    with pytest.raises(DataError, match=r"cannot be read .is larger than 1073741824 bytes"):
        read_cells(path)


TITLED = {
    "title": "Study export 2024\n\nimage,patient,normal\na.jpg,P1,1\n",
    "title with commas": "Export, 3 March 2024, site B\nimage,patient,normal\na.jpg,P1,1\n",
    "semicolons below a comma": "Export, 3 March 2024\nimage;patient;normal\na.jpg;P1;1\n",
    "excel's separator": "sep=;\nExport;;\nimage;patient;normal\na.jpg;P1;1\n",
}


@pytest.mark.parametrize("name", TITLED)
def test_a_title_above_the_header_is_passed_over(tmp_path: Path, name: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(TITLED[name])
    table = read_labels(path)
    (row,) = table.rows
    assert (row.file, row.patient, row.columns) == ("a.jpg", "P1", {"normal": 1.0})
    assert row.line == TITLED[name].count("\n")
    (note,) = table.notes
    assert re.search(rf"the header is line {row.line - 1};.*'(Study )?[Ee]xport", note)


def test_a_title_above_the_header_of_a_workbook(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for cells in (["Study export"], [], ["image", "patient"], ["a.jpg", "P1"]):
        book.active.append(cells)
    book.save(tmp_path / "labels.xlsx")
    table = read_labels(tmp_path / "labels.xlsx")
    assert [(row.file, row.patient, row.line) for row in table.rows] == [("a.jpg", "P1", 4)]


def test_a_header_without_known_names_is_still_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("quality,grade\nimage,id\n1,2\n")
    # Its second line looks like a header, but the message should name the columns that are there.
    assert [row.file for row in read_labels(path).rows] == ["1"]
    path.write_text("Bild;Typ\n10_left;fundus\n10_right;fundus\n")
    with pytest.raises(DataError, match="no column that identifies the photos; columns: Bild, Typ"):
        read_labels(path)
    path.write_text("quality,grade\n1,2\n")
    with pytest.raises(DataError, match="no column that identifies the photos; columns: quality, grade"):
        read_labels(path)


def test_a_quote_that_is_never_closed_swallows_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text('image,note,level\na.jpg,fine,0\nb.jpg,"5 mm,1\nc.jpg,fine,2\n')
    with pytest.raises(DataError, match=r"line 3: has a quote that is never closed"):
        read_labels(path)
    path.write_text('image,note,level\na.jpg,"two\nlines",0\nb.jpg,say "x" here,1\n')
    assert [row.file for row in read_labels(path).rows] == ["a.jpg", "b.jpg"]


def test_numbers_of_which_excel_lost_digits_are_refused(tmp_path: Path) -> None:
    """Two people of one national registry would become one, and a name that of another photo."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["image", "patient"])
    book.active.append(["a.jpg", 1.10105199001011e17])
    book.save(tmp_path / "labels.xlsx")
    with pytest.raises(DataError, match=r"cell B2 is a number of more than 15 digits"):
        read_labels(tmp_path / "labels.xlsx")


def test_rounded_numbers_are_nobody(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("image,patient\na.jpg,1.10105E+17\nb.jpg,1.10105E+17\nc.jpg,12\n")
    table = read_labels(path)
    assert [row.patient for row in table.rows] == [None, None, "12"]
    assert any("2 patients are rounded numbers, such as 1.10105E+17 in line 2" in note for note in table.notes)


@pytest.mark.parametrize(("true", "false"), [("True", "False"), ("1", "0")])
def test_the_split_of_fastai(tmp_path: Path, true: str, false: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(f"fname,label,is_valid\na.jpg,1,{true}\nb.jpg,0,{false}\nc.jpg,0,\n")
    assert [row.split for row in read_labels(path).rows] == ["val", "train", None]
    assert list(read_labels(path).rows[0].columns) == ["label"]


def test_the_column_with_names_of_photos_is_the_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("ID,Picture of the eye,level\n0,a.jpg,1\n1,b.jpg,0\n")
    table = read_labels(path)
    assert [row.file for row in table.rows] == ["a.jpg", "b.jpg"]
    assert any(
        "'Picture of the eye' has names of photos and is read as the file, and 'ID' as a label" in n
        for n in table.notes
    )
    path.write_text("ID,Left-Fundus,Right-Fundus,N\n0,0_left.jpg,0_right.jpg,1\n")
    with pytest.raises(DataError, match="names of photos in the columns 'Left-Fundus' and 'Right-Fundus'; one row per"):
        read_labels(path)


@pytest.mark.parametrize("name", ["Retinopathy grade", "Patient Age", "Patient Sex", "Spatial"])
def test_facts_about_patients_are_no_patients(tmp_path: Path, name: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(f"image,{name}\na.jpg,1\n")
    assert read_labels(path).notes == []

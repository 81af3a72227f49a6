using System.Text.RegularExpressions;

namespace Vmm.Tests.House;

/// <summary>Finds citations of docs/spec in a text, and attempts at citations that do not have the form that docs/spec/README.md gives.</summary>
internal static partial class CitationFinder
{
    private const string Label = @"(?:[SCL]-\d+|\d+(?:\.\d+)*)(?![\w-])";

    /// <summary>A space, or a line break with the comment marker of the next line.</summary>
    private const string Gap = @"(?: |[ ]*\r?\n[ \t]*(?:/{2,3}[ \t]*)?)";

    private const string Labels = Label + "(?:(?:," + Gap + "|" + Gap + "(?:and|to)" + Gap + ")" + Label + ")*";
    private const string Documents = "stream|qmp|vfio-migration|vfio-user|lab";

    /// <summary>The file name of each document in docs/spec, by the short name that citations use.</summary>
    internal static readonly IReadOnlyDictionary<string, string> Files = new Dictionary<string, string>
    {
        ["stream"] = "qemu-migration-stream.md", ["qmp"] = "qmp.md", ["vfio-migration"] = "vfio-migration.md", ["vfio-user"] = "vfio-user.md", ["lab"] = "vfio-lab.md",
    };

    private static readonly (Regex Form, string What)[] s_otherForms =
    [
        (SpecWord(), "says \"spec\" without a document"),
        (FileName(), "cites by a file name"),
        (SectionWord(), "puts a word between document and number"),
        (OtherName(), "names the document in another way"),
        (Trap(), "cites a trap without its document"),
        (BareLabel(), "cites a label without its document"),
    ];

    /// <summary>One target of a citation.</summary>
    internal readonly record struct Citation(int Line, string Document, string Target);

    /// <summary>A text that means a citation but has another form.</summary>
    internal readonly record struct OtherForm(int Line, string Text, string What);

    /// <summary>All targets that a text cites.</summary>
    internal static IEnumerable<Citation> Citations(string text) =>
        from Match citation in CitationForm().Matches(text)
        from Match target in LabelForm().Matches(citation.Groups["labels"].Value)
        select new Citation(LineOf(text, citation.Groups["labels"].Index + target.Index), citation.Groups["document"].Value, target.Value);

    /// <summary>All texts that mean a citation but have another form.</summary>
    internal static IEnumerable<OtherForm> OtherForms(string text)
    {
        string rest = CitationForm().Replace(text, static m => Regex.Replace(m.Value, @"[^\r\n]", " "));
        return from form in s_otherForms
               from Match match in form.Form.Matches(rest)
               select new OtherForm(LineOf(text, match.Index), match.Value.ReplaceLineEndings(" "), form.What);
    }

    /// <summary>Sections and labels that a document of docs/spec defines, with the line of each definition.</summary>
    internal static IEnumerable<(int Line, string Target)> Definitions(string document) =>
        from line in OutsideFences(document)
        from Match match in Definition().Matches(line.Text)
        select (line.Number, match.Groups[1].Success ? match.Groups[1].Value : match.Groups[2].Value);

    /// <summary>References of a document to its own sections ("section 3.2") and labels (bare).</summary>
    internal static IEnumerable<(int Line, string Target)> OwnReferences(string document) =>
        from line in OutsideFences(document)
        from Match match in OwnReference().Matches(line.Text)
        from Match target in LabelForm().Matches(match.Groups["labels"].Value)
        select (line.Number, target.Value);

    private static IEnumerable<(int Number, string Text)> OutsideFences(string document)
    {
        bool isCode = false;
        int number = 0;
        foreach (string line in document.Split('\n'))
        {
            number++;
            if (line.StartsWith("```", StringComparison.Ordinal)) isCode = !isCode;
            else if (!isCode) yield return (number, line);
        }
    }

    private static int LineOf(string text, int index) => 1 + text.AsSpan(0, index).Count('\n');

    [GeneratedRegex(@"(?<![\w/.-])(?<document>" + Documents + ")" + Gap + "(?<labels>" + Labels + ")")]
    private static partial Regex CitationForm();

    [GeneratedRegex(Label)]
    private static partial Regex LabelForm();

    [GeneratedRegex(@"^#{2,3} (\d+(?:\.\d+)*)\.? |\*\*((?:\d+\.)+\d+|[SCL]-\d+)\*\*")]
    private static partial Regex Definition();

    [GeneratedRegex(@"\bsections?" + Gap + "(?<labels>" + Labels + @")|(?<![\w/.*-])(?<labels>[SCL]-\d+)(?![\w*-])")]
    private static partial Regex OwnReference();

    [GeneratedRegex(@"(?<![\w/])[Ss]pecs?\b(?![/\\-]).{0,20}")]
    private static partial Regex SpecWord();

    [GeneratedRegex(@"(?<![\w/])(?:qemu-migration-stream|qmp|vfio-migration|vfio-user|vfio-lab)\.md\b.{0,12}|\b(?:qemu-migration-stream|qmp|vfio-migration|vfio-user|vfio-lab)\.md,? (?:sections? )?[\dSCL][\d.-]*")]
    private static partial Regex FileName();

    [GeneratedRegex(@"(?<![\w/.-])(?:" + Documents + @")(?:'s)?,?" + Gap + @"(?:sections?|chapters?|items?|rules?|traps?|table)" + Gap + @"(?:[SCL]-)?\d[\d.]*")]
    private static partial Regex SectionWord();

    [GeneratedRegex(@"\b(?:Stream|QMP|Qmp|VFIO migration|Vfio-migration|VFIO-migration|Vfio-user|VFIO-user|vfio user|vfio migration|Lab)" + Gap + @"\d+(?:\.\d+)+|\b(?:qemu-migration-stream|vfio-lab)" + Gap + @"(?:[SCL]-)?\d[\d.]*")]
    private static partial Regex OtherName();

    [GeneratedRegex(@"\b[Tt]raps?" + Gap + @"\d+")]
    private static partial Regex Trap();

    [GeneratedRegex(@"(?<![\w/.-])[SCL]-\d+(?![\w-])")]
    private static partial Regex BareLabel();
}

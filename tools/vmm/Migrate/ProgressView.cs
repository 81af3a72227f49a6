using System.Diagnostics;
using Spectre.Console;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Migrate;

/// <summary>Shows the progress of a migration on stderr: on a terminal as a bar, elsewhere as a line every few seconds.</summary>
internal sealed class ProgressView : IDisposable
{
    private const int BarWidth = 30;
    private static readonly TimeSpan s_linePeriod = TimeSpan.FromSeconds(2);
    private readonly CliContext _context;
    private readonly string _label;
    private readonly IAnsiConsole? _terminal;
    private long _lastLine;
    private string _lastStatus = string.Empty;
    private bool _drawn;

    public ProgressView(CliContext context, string label = "")
    {
        _context = context;
        _label = label;
        if (!context.ErrorIsTerminal) return;
        _terminal = AnsiConsole.Create(new AnsiConsoleSettings { Out = new AnsiConsoleOutput(context.Error), Ansi = AnsiSupport.Yes, Interactive = InteractionSupport.Yes });
    }

    public void Show(MigrationReport report)
    {
        if (_terminal is not null) Draw(_terminal, report);
        else if (report.Status != _lastStatus || Stopwatch.GetElapsedTime(_lastLine) >= s_linePeriod) WriteLine(report);
    }

    /// <summary>Clears the bar.</summary>
    public void Dispose()
    {
        if (_drawn) _context.Error.Write("\r\x1b[2K");
        _drawn = false;
    }

    private void WriteLine(MigrationReport report)
    {
        _lastLine = Stopwatch.GetTimestamp();
        _lastStatus = report.Status;
        _context.Error.WriteLine(_label + report.ProgressLine());
    }

    private void Draw(IAnsiConsole terminal, MigrationReport report)
    {
        double done = report.RamTotal > 0 ? Math.Clamp(1 - (report.RamRemaining / report.RamTotal), 0, 1) : 0;
        int full = (int)(done * BarWidth);
        string text = $" {done * 100,3:0}% {_label}{report.ProgressLine()}";
        int room = terminal.Profile.Width - BarWidth - 1;
        if (room < 10) room = text.Length;
        _context.Error.Write("\r\x1b[2K");
        terminal.Markup($"[green]{new string('━', full)}[/][grey]{new string('─', BarWidth - full)}[/]{Markup.Escape(text.Length > room ? text[..room] : text)}");
        _drawn = true;
    }
}

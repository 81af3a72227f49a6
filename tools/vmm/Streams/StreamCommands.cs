using System.Text;
using Vmm.Migration.Viewer;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Streams;

/// <summary><c>vmm stream show</c> and <c>vmm stream check</c>: read files without a VM.</summary>
internal sealed class StreamCommands(CliContext context)
{
    /// <summary>Prints the content of the stream. Prints a broken stream as far as it can be read, and returns code 1.</summary>
    public ExitCode Show(string path, bool pages, bool json) => Finish(StreamDocument.ReadFile(path, pages), json, withEntries: true);

    /// <summary>Prints what breaks the format and returns code 1, or prints that nothing does.</summary>
    public ExitCode Check(string path, bool json) => Finish(StreamDocument.ReadFile(path), json, withEntries: false);

    private ExitCode Finish(StreamDocument stream, bool json, bool withEntries)
    {
        if (json)
        {
            using var bytes = new MemoryStream();
            stream.WriteJson(bytes, withEntries);
            context.Out.WriteLine(Encoding.UTF8.GetString(bytes.GetBuffer(), 0, (int)bytes.Length));
        }
        else if (withEntries)
        {
            stream.WriteText(context.Out);
        }
        else
        {
            stream.WriteFindings(context.Out);
        }
        return stream.IsValid ? ExitCode.Ok : ExitCode.Failed;
    }
}

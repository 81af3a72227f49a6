using Vmm.Core.Devices;
using Vmm.Tools.Cli.Registry;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Client;

/// <summary>The VM that a command addresses: <c>--vm N</c>, <c>--qmp PATH</c>, or the only running VM.</summary>
internal sealed record VmTarget(string? Vm, string? Qmp)
{
    public async Task<IMonitor> Connect(CliContext context, CancellationToken cancel)
    {
        if (Vm is not null && Qmp is not null) throw CliException.Usage("--vm and --qmp exclude each other");
        string path = Qmp is not null ? SocketPath(Qmp) : VmDirectory.Open(context.GetVariable).Resolve(Vm).QmpPath;
        return await context.Connect(path, cancel);
    }

    /// <summary>Returns the absolute path of a path or of QEMU's <c>unix:PATH</c>.</summary>
    public static string SocketPath(string text)
    {
        string path = text.StartsWith("unix:", StringComparison.Ordinal) ? OptionList.Split(text[5..])[0] : text;
        return path.Length > 0 ? Path.GetFullPath(path) : throw CliException.Usage("--qmp needs a path");
    }
}

using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Tools.Cli;
using Vmm.Tools.Cli.Shell;

// Before everything else, because it may start this program again.
if (args.Where(static a => !a.StartsWith('-')).Take(2).ToArray() is ["run", ..] or ["device", "serve"])
{
    try
    {
        Posix.Confine();
    }
    catch (ChannelException e)
    {
        await Console.Error.WriteLineAsync($"vmm: this process cannot give up its privileges: {e.Message}");
        return (int)ExitCode.Failed;
    }
}
using var interrupts = new Interrupts();
using var output = new StreamWriter(Console.OpenStandardOutput()) { AutoFlush = true };
return await CliRoot.Invoke(args, new CliContext
{
    Out = output,
    Error = Console.Error,
    ErrorIsTerminal = !Console.IsErrorRedirected && Environment.GetEnvironmentVariable("TERM") is not (null or "dumb"),
    Interrupted = interrupts.Token,
    CommandLine = args,
});

using Vmm.Tools.Cli;
using Vmm.Tools.Cli.Shell;

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

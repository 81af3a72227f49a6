namespace Vmm.Tools.Cli.Shell;

/// <summary>A QMP error answer.</summary>
internal sealed class MonitorException(string errorClass, string description) : Exception(description)
{
    public string ErrorClass { get; } = errorClass;
}
